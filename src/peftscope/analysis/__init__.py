"""From records to tables, statistics and studies."""
