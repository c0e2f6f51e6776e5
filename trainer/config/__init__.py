"""What a run is asked to do: the settings, their presets, their command line, their YAML."""
