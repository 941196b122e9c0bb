//! Writes the seeds of the targets for images: small ones made by qemu-img and qemu-io, and the same with one thing
//! wrong. Run by hand: `cargo run --example image_seeds`. Needs qemu-utils.

use std::fs;
use std::path::Path;
use std::process::Command;

use plyfs::image::Chain;
use plyfs_fuzz::image::pack;

fn tool(program: &str, args: &[&str]) {
    let out = Command::new(program).args(args).output().expect("qemu-utils are installed");
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

fn put(target: &str, name: &str, chain: Chain, file: &[u8]) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    fs::create_dir_all(&dir).expect("a directory");
    fs::write(dir.join(name), pack(chain, file)).expect("a file");
}

/// Made by qemu-img, then written into.
fn made(format: &str, options: &str, size: &str, commands: &[&str]) -> Vec<u8> {
    let file = std::env::temp_dir().join(format!("plyfs-seed-{}", std::process::id()));
    let path = file.to_str().expect("UTF-8");
    tool("qemu-img", &["create", "-q", "-f", format, "-o", options, path, size]);
    let mut args = vec!["-f", format];
    args.extend(commands.iter().flat_map(|command| ["-c", *command]));
    tool("qemu-io", &[&args[..], &[path]].concat());
    let bytes = fs::read(&file).expect("the image");
    fs::remove_file(&file).expect("remove it");
    bytes
}

fn changed(bytes: &[u8], at: usize, with: &[u8]) -> Vec<u8> {
    let mut out = bytes.to_vec();
    out[at..at + with.len()].copy_from_slice(with);
    out
}

fn qcow2() {
    let target = "image_qcow2";
    let packed = [
        "write -c -P 1 0 4k",
        "write -c -P 2 8k 4k",
        "write -c -P 3 60k 4k",
        "write -P 4 16k 100",
        "write -z 20k 8k",
    ];
    let small = ["write -P 5 0 100", "write -P 6 1k 1k", "write -z 4k 512", "write -c -P 7 8k 512"];
    let deflate = made("qcow2", "cluster_size=4k", "64k", &packed);
    let zstd = made("qcow2", "cluster_size=4k,compression_type=zstd", "65k", &packed);
    let extended = [
        "write -P 1 0 512",
        "write -z 1k 1k",
        "write -P 9 20k 700",
        "write -c -P 3 32k 16k",
        "discard 0 512",
    ];
    let extended = made("qcow2", "cluster_size=16k,extended_l2=on", "100k", &extended);
    let old =
        made("qcow2", "compat=0.10,cluster_size=512", "33k", &["write -P 5 0 100", "write -P 7 32k 512"]);
    for (name, bytes) in [
        ("deflate", &deflate),
        ("zstd", &zstd),
        ("extended", &extended),
        ("old", &old),
        ("small", &made("qcow2", "cluster_size=512", "70k", &small)),
        ("usual", &made("qcow2", "cluster_size=64k", "3G", &["write -c -P 1 0 64k", "write -z 1G 64k"])),
        ("reserved", &made("qcow2", "cluster_size=512,preallocation=metadata", "8k", &["write -z 1k 1k"])),
        ("empty", &made("qcow2", "cluster_size=2M", "1T", &["read 0 1"])),
    ] {
        put(target, name, Chain::Alone, bytes);
    }
    // What was used against others; the header's fields are in docs/interop/qcow2.txt.
    let backing = changed(&changed(&deflate, 8, &600u64.to_be_bytes()), 16, &11u32.to_be_bytes());
    let backing = changed(&backing, 600, b"/etc/shadow");
    put(target, "backing-file", Chain::Alone, &backing);
    put(target, "backing-file-given", Chain::OnBacking, &backing);
    put(target, "data-file", Chain::Alone, &changed(&deflate, 79, &[4]));
    put(target, "2-63-bytes", Chain::Alone, &changed(&deflate, 24, &(1u64 << 63).to_be_bytes()));
    put(target, "l1-beyond", Chain::Alone, &changed(&deflate, 40, &(1u64 << 40).to_be_bytes()));
    put(target, "header-length", Chain::Alone, &changed(&deflate, 100, &u32::MAX.to_be_bytes()));
    let l1 = u64::from_be_bytes(deflate[40..48].try_into().expect("8 bytes"));
    put(target, "l2-is-l1", Chain::Alone, &changed(&deflate, l1 as usize, &(1 << 63 | l1).to_be_bytes()));
}

fn vmdk() {
    let target = "image_vmdk";
    let commands = ["write -P 1 0 100", "write -P 2 100k 512", "write -z 64k 64k"];
    let sparse = made("vmdk", "zeroed_grain=on", "300k", &commands);
    let stream =
        made("vmdk", "subformat=streamOptimized", "300k", &["write -P 1 0 64k", "write -P 2 128k 64k"]);
    put(target, "sparse", Chain::Alone, &sparse);
    put(target, "stream", Chain::Alone, &stream);
    put(
        target,
        "large",
        Chain::Alone,
        &made("vmdk", "subformat=monolithicSparse", "4G", &["write -P 1 0 512"]),
    );
    // A footer, as VMware writes it: the header says that the directory is at the end.
    let mut footer = changed(&stream, 56, &u64::MAX.to_le_bytes());
    footer.resize(footer.len().next_multiple_of(512), 0);
    let mut marker = [0; 512];
    (marker[0], marker[12]) = (1, 3);
    footer.extend(marker);
    footer.extend_from_slice(&stream[..512]);
    footer.extend([0; 512]);
    put(target, "footer", Chain::Alone, &footer);
    let text = sparse.windows(6).position(|bytes| bytes == b"SPARSE").expect("an extent");
    put(target, "host-file", Chain::Alone, &changed(&sparse, text, b"FLAT  "));
    put(target, "capacity", Chain::Alone, &changed(&sparse, 12, &u64::MAX.to_le_bytes()));
    put(target, "grain", Chain::Alone, &changed(&sparse, 20, &(1u64 << 63).to_le_bytes()));
}

fn main() {
    qcow2();
    vmdk();
}
