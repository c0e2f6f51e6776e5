"""A run's weights for other programs: diffusers and safetensors."""
