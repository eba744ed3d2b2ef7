"""Products of rows with weights (`linear`)."""
