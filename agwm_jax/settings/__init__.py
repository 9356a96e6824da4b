"""All of the configuration: schema, YAML and the command line."""
