"""Where people already work: adapters to other projects, each of which is imported only when it is used."""
