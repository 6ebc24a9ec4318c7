"""The settings, section by section, each with its meaning."""
