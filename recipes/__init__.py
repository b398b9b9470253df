"""Recipes shipped with the package; `minitron run NAME` finds them here."""
