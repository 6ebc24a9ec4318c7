"""Recipes as TOML: runs, objectives, tables of the paper."""
