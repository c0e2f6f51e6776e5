"""What is done with a trained model. The only place of the trainer where a VAE or PIL is loaded, inside functions."""
