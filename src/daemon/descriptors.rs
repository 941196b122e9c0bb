//! How the descriptors of a worker are divided between disks, layers and all else.

/// Descriptors that are not for disks: those of requests, bases, the cache and connections.
const OTHERS: u64 = 128;
/// Descriptors of an attached disk: data file, map file, live map, and one more while a map file is replaced.
const OF_A_DISK: u64 = 4;
/// Most attached disks. Each has memory mappings too, of which the kernel allows a process 65,530.
const MOST_ATTACHED: u64 = 8192;
/// Most files of layers that are open.
const MOST_LAYER_FILES: u64 = 16_384;

/// Descriptors for the files of layers, an eighth.
pub(super) fn for_layers(descriptors: u64) -> u64 {
    (descriptors / 8).clamp(4, MOST_LAYER_FILES)
}

/// Most disks that are attached at a time.
pub(super) fn most_attached(descriptors: u64) -> usize {
    let others = OTHERS.min(descriptors / 2) + for_layers(descriptors);
    (descriptors.saturating_sub(others) / OF_A_DISK).clamp(4, MOST_ATTACHED) as usize
}
