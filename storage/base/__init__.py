"""What all three packages use and is not about stores: errors, the console, files, reading what others wrote."""
