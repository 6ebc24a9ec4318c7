"""Everything that touches disk: workspaces, manifests, trajectories, the top-k cache and the catalog.

Knows no model and prints nothing.
"""
