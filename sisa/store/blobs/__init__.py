"""Named bytes at rest: files, blob stores, and the keys that seal them.

files                   whole files on a disk: atomic writes, locks
sqlite_files            how SQLite files are opened, and read beside connections
local_blobs             a blob store in a directory
s3_blobs                a blob store in a bucket, through `s3_client`
lease                   a blob store as the workers of a run see it
keyring                 a key for each file
sealed_area             a storage area: how its files are written and read, sealed or plain
temporary_directories   directories outside the model, erased even after a crash
"""
