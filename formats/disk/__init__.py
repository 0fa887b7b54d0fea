"""Files and directories, whatever they hold."""
