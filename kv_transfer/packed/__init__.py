"""Blocks that lie scattered in a prefill engine's KV cache cross the network together: its worker copies them into a
slot of a staging buffer, the decode rank reads the slot as one piece through NIXL, and spreads it over blocks of its
own.

    decode rank (puller.py)          prefill worker (packer.py)
        open, with a list of pages  ->                              once for each pair of workers
                                    <-  opened, with the staging buffer
        pack, with numbers of pages ->                              for each slotful, several at a time
                                        copies, or quantises (fp8.py), into a slot
                                    <-  packed
        reads the slot (NIXL)
        free                        ->
        copies, or dequantises, into its own blocks

Messages travel over kv_transfer.side_channel. What was read counts only if the slot was this reader's all the time. A
prefill worker keeps a slot for `SLOT_SECONDS` after the order, or until it hears that it is free or the reader gone;
a decode rank gives an order up after `ORDER_SECONDS`, which is less, and later than the prefill worker began to count.
Whether the blocks were held so long is asked in the end, as on every path (kv_transfer.lease_check).
"""

ORDER_SECONDS = 10.0
SLOT_SECONDS = 20.0
NUM_SLOTS = 8
