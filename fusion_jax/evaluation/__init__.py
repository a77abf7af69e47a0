"""Measures, tables and plots of what a model does on data it has not seen."""
