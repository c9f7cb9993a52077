"""Train, measure and compare mechanisms under equal conditions."""
