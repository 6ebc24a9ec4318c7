"""Messages between client and service, as Arrow streams."""
