"""Run engine bundles: the runner protocol and its backends, decode states, sessions, sampling."""
