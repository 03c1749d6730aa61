"""The backends, one file each; `ringexport.runtime.registry` imports the one asked for."""
