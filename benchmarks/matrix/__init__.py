"""The benchmark that one YAML file describes: data, masks or scans, methods, seeds."""
