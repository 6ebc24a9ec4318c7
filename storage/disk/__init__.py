"""Files and folders that appear whole or not at all, are set aside, and are collected as garbage."""
