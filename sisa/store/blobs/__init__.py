"""Named bytes.

files             whole files on a disk: atomic writes, locks, temporary directories
local_blobs       a blob store in a directory
object_blobs      a blob store in a bucket, through `object_client`
lease             a blob store as the workers of a run see it
keyring           a key for each file, and stores of sealed files
"""
