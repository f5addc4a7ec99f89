"""A database: get and put over a store and a catalog, within limits, for many processes."""
