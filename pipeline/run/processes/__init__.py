"""The processes of a run on one machine: their number, their devices and environments, their start and end."""
