"""Casparian Flow: files dropped into directories become tables, with proof for every row."""
