"""Memory: shapes of models and the tracker of live tensor bytes."""
