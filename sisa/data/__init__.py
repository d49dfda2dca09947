"""Records in: sources, rules for records, identifiers, and sample data.

reader            records, texts and ids of all sources, or everything that is wrong in them
source_rows       rows of JSON Lines, Parquet and Hugging Face data sets (`dataset_export`)
record_rules      everything that can be wrong in a record
overlap           wording that records share with the corpus of a base
identifiers       identifiers of a person, standardised and hashed
drop_lists        the deletion lists of California's DROP
samples           made-up people and a corpus without people
"""
