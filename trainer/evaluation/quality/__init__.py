"""How good generated images are: Fréchet distance, Inception score, precision and recall, against a reference."""
