"""What is known of a column of Parquet and of its page: the members of its row in the table of `next_pages`."""

#: Members of a column's row in the table of `next_pages`. First what is known of the column: where its next page begins
#: in the file, where its chunk ends, bytes of a value, its highest definition level, how it is compressed, bytes to
#: read at once, values to pass over; and what no page can exceed: bytes when decompressed, and values still to come.
AT, END, WIDTH, MAX_LEVEL, CODEC, GUESS, SKIPPED, MOST_BYTES, MOST_VALUES = range(9)
#: Then memory for its page's values and for its dictionary: addresses and bytes; and how many entries there are.
MEMORY, ROOM, DICTIONARY, DICTIONARY_ROOM, N_ENTRIES = range(9, 14)
#: Then what the header of its page says,
STORED, DECODED, KIND, N_VALUES, ENCODING, N_NULLS, LEVELS, COMPRESSED, CRC, HAS_CRC = range(14, 24)
LEVEL_ENCODING, N_ROWS, REPETITIONS = range(24, 27)
#: where the page begins in the scratch memory, where its next value lies decoded, and how many of its values are left.
BEGIN, ADDRESS, LEFT = range(27, 30)
N_MEMBERS = 30
#: How a chunk is compressed: not at all, by snappy, or by something that is not known here.
UNCOMPRESSED, SNAPPY, OTHER_CODEC = range(3)
#: Kinds of pages.
DATA_PAGE, INDEX_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = range(4)
#: Encodings of values that are known here.
PLAIN, PLAIN_DICTIONARY, RLE_DICTIONARY = 0, 2, 8
RLE = 3
#: How `next_pages` ended: all columns have values; more memory is needed (scratch, for values, for a dictionary); a
#: page was read that somebody else has to decompress or check; the file cannot be read, or makes no sense. The last one
#: is of a single page, which was passed over.
DONE, NEEDS_SCRATCH, NEEDS_ROOM, NEEDS_DICTIONARY, FOREIGN, SENSELESS, PASSED = range(7)
