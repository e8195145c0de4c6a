"""KV straight from a prefill GPU's memory to a decode GPU of the same host, copied by one kernel.

    driver    shares and maps GPU memory between processes (CUDA IPC)
    offer     what a prefill worker tells of its memory in the handshake
    kernel    copies lists of pages, wherever they lie
    transfer  one pull: ids to the GPU, the kernel on a stream of its own, an event when it is done
    agent     stands before NIXL's agent and takes the reads that can go this way
    path      chooses the way at the handshake

vLLM's own connector decides which bytes go where (tensor parallel sizes, block sizes, prefix hits); it names them by
ids into two lists of pages, its own and the peer's, and asks NIXL's agent to read. Whoever reads is all that changes
here, so leases, notifications and completion stay as they are.
"""
