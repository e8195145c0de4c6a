// Copies pages through a multiprocessor's shared memory with its bulk copy engine (cp.async.bulk, sm_90).
//
// One thread of each block keeps `num_stages - 2` chunks on their way in and up to two on their way out; nobody else has
// anything to do. That is enough to fill NVLink from a few multiprocessors, where loads and stores of registers
// take more than half of them. Shared memory: num_stages * chunk_bytes.

#define MAX_STAGES 16

__device__ __forceinline__ unsigned shared_address(const void* pointer)
{
    return (unsigned)__cvta_generic_to_shared(pointer);
}

__device__ __forceinline__ void load(void* buffer, unsigned long long source, unsigned bytes, void* barrier)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(buffer)),
                 "l"(source), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

__device__ __forceinline__ void wait(void* barrier, unsigned parity)
{
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}

__device__ __forceinline__ void store(unsigned long long destination, const void* buffer, unsigned bytes)
{
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(destination),
                 "r"(shared_address(buffer)), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Copies num_regions * num_blocks pages, block by block of each region. `ids` are those of `sources`, then those of
// `destinations`, each `offsets[num_regions], blocks[num_blocks]`: page `offsets[r] + blocks[b]` of a table. They may lie
// in the host's memory, so they are read a round before they are needed. Addresses and lengths are multiples of 16
// bytes. One warp per block.
extern "C" __global__ void __launch_bounds__(32)
    copy_pages(const unsigned long long* sources, const unsigned long long* destinations, const int* ids,
               int num_regions, int num_blocks, int page_bytes, int chunk_bytes, int num_stages)
{
    extern __shared__ __align__(128) unsigned char buffers[];
    __shared__ unsigned long long full[MAX_STAGES];
    __shared__ unsigned long long targets[MAX_STAGES];
    __shared__ unsigned sizes[MAX_STAGES];
    const int lane = threadIdx.x;
    if (lane == 0) {
        for (int stage = 0; stage < num_stages; ++stage)
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&full[stage])) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncwarp();

    int num_loaded = 0, num_stored = 0;
    auto store_next = [&]() {
        const int stage = num_stored % num_stages;
        wait(&full[stage], (num_stored / num_stages) & 1);
        store(targets[stage], buffers + stage * chunk_bytes, sizes[stage]);
        ++num_stored;
    };
    const int step = gridDim.x, num_pages = num_regions * num_blocks;
    const int* source_ids = ids;
    const int* destination_ids = ids + num_regions + num_blocks;
    // Each lane looks up one page, so that 32 of them cost one round trip to memory.
    int source_offset = 0, source_block = 0, destination_offset = 0, destination_block = 0;
    auto read_ids = [&](int page) {
        if (page >= num_pages) return;
        const int region = page / num_blocks, block = num_regions + page % num_blocks;
        source_offset = source_ids[region], source_block = source_ids[block];
        destination_offset = destination_ids[region], destination_block = destination_ids[block];
    };
    int own = blockIdx.x + lane * step;
    read_ids(own);
    for (int first = blockIdx.x; first < num_pages; first += 32 * step) {
        unsigned long long source = 0, destination = 0;
        if (own < num_pages) {
            source = sources[source_offset + source_block];
            destination = destinations[destination_offset + destination_block];
        }
        own += 32 * step;
        read_ids(own);
        for (int i = 0; i < 32 && first + i * step < num_pages; ++i) {
            const unsigned long long from = __shfl_sync(0xffffffffu, source, i);
            const unsigned long long to = __shfl_sync(0xffffffffu, destination, i);
            if (lane == 0)
                for (int offset = 0; offset < page_bytes; offset += chunk_bytes) {
                    const int stage = num_loaded % num_stages;
                    // All but the last chunk stored have left their buffers, and so this one, stored before that.
                    if (num_loaded >= num_stages) asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
                    targets[stage] = to + offset;
                    sizes[stage] = min(chunk_bytes, page_bytes - offset);
                    load(buffers + stage * chunk_bytes, from + offset, sizes[stage], &full[stage]);
                    if (++num_loaded - num_stored > num_stages - 2) store_next();
                }
            __syncwarp();
        }
    }
    if (lane == 0) {
        while (num_stored < num_loaded) store_next();
        asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
}
