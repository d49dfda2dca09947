"""Rights of a data subject beside erasure: access, restriction, recipients."""
