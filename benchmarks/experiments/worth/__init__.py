"""What each step is worth: an instrument that tells the paper's four settings, and ways to better data, apart."""
