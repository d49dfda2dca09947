"""Preference: one answer is to be less likely than another, or than it was before."""
