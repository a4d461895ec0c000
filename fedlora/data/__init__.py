"""From a source of rows to the row numbers of every client: sources, partition, index."""
