"""Models as export folders and as files for mltools."""
