"""The configuration: its schema, where each value comes from, and the recipes."""
