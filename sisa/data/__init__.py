"""Records in.

reader            JSON Lines, Parquet and Hugging Face data sets (`dataset_export`) as records
record_rules      everything that can be wrong in a record
overlap           wording that records share with the corpus of a base
identifiers       identifiers of a person, standardised and hashed
drop_lists        the deletion lists of California's DROP
samples           made-up people and a corpus without people
"""
