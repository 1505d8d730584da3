"""What every command needs around its work: console, whole files, output directories, signals, processes, devices."""
