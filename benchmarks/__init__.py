"""What things cost, side by side with others.  ``make bench`` runs all of it; see RESULTS.rst."""
