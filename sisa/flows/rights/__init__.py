"""Rights of a data subject beside erasure: access, restriction, recipients; and California's DROP."""
