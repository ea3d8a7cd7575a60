"""What evaluate.py measures: likelihoods, distances, their uncertainty, and the report."""
