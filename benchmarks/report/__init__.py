"""What readers see of the results: tables in README.md and docs/, and the README's pictures."""
