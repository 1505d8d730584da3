"""`python -m spectralvae`."""

from spectralvae.cli import main

main()
