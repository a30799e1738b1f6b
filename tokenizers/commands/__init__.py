"""What the command line does with files (`files`) and with data sets (`dataset`)."""
