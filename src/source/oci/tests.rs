//! Manifests and archives as tools make them, and as nothing should.

use std::fmt::Write as _;

use super::{Disk, Manifest, disk};

const DIGEST: &str = "sha256:0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a";

fn layer(media: &str, size: &str) -> String {
    format!(r#"{{"mediaType":"{media}","digest":"{DIGEST}","size":{size}}}"#)
}

fn manifest(layers: &[String]) -> String {
    format!(r#"{{"schemaVersion":2,"config":{{"digest":"x","size":1}},"layers":[{}]}}"#, layers.join(","))
}

fn refusal(text: &str) -> String {
    Manifest::parse(text.as_bytes()).expect_err("must be refused")
}

#[test]
fn the_one_blob_of_a_manifest_is_the_disk() {
    let tar = "application/vnd.oci.image.layer.v1.tar";
    for (media, is_tar) in
        [(tar, true), ("application/octet-stream", false), ("application/x-qemu-disk", false)]
    {
        let found = Manifest::parse(manifest(&[layer(media, "700")]).as_bytes());
        assert_eq!(found, Ok(Manifest::Disk(Disk { digest: DIGEST.into(), size: 700, is_tar })));
    }
    for media in [
        format!("{tar}+gzip"),
        format!("{tar}+zstd"),
        "application/vnd.docker.image.rootfs.diff.tar.gzip".into(),
    ] {
        let why = refusal(&manifest(&[layer(&media, "700")]));
        assert!(why.contains("compressed as a whole") && why.contains("--dest-decompress"), "{why}");
    }
    let two = [layer(tar, "1"), layer(tar, "1")];
    assert!(refusal(&manifest(&two)).contains("it has 2 layers"));
    assert!(refusal(&manifest(&[])).contains("no layer"));
    assert!(refusal(&manifest(&[layer(tar, "0")])).contains("0 bytes"));
    assert!(refusal(&manifest(&[layer(tar, "18446744073709551615")])).contains("18446744073709551615 bytes"));
    assert!(refusal(r#"{"schemaVersion":1,"fsLayers":[]}"#).contains("schema version 2"));
    assert!(refusal("<html>").contains("not one of OCI or Docker"));
    let sha512 = manifest(&[layer("x", "1").replace("sha256", "sha512")]);
    assert!(refusal(&sha512).contains("not SHA-256"));
}

#[test]
fn an_index_leads_to_the_manifest_for_this_machine() {
    let entry = |architecture: &str, digest: &str| {
        format!(
            r#"{{"mediaType":"m","digest":"{digest}","size":1,"platform":{{"os":"linux","architecture":"{architecture}"}}}}"#
        )
    };
    let index = |entries: &[String]| format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entries.join(","));
    let ours = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let other = DIGEST.replace("0a", "0b");
    let text = index(&[entry("s390x", &other), entry(ours, DIGEST)]);
    assert_eq!(Manifest::parse(text.as_bytes()), Ok(Manifest::Other(DIGEST.into())));
    assert_eq!(
        Manifest::parse(index(&[entry("s390x", &other)]).as_bytes()),
        Ok(Manifest::Other(other.clone()))
    );
    let none = refusal(&index(&[entry("s390x", &other), entry("ppc64le", &other)]));
    assert!(none.contains("no manifest for linux/"), "{none}");
}

/// One member of an archive.
fn member(name: &str, kind: u8, bytes: &[u8], size: Option<u64>) -> Vec<u8> {
    let mut header = vec![0; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[257..265].copy_from_slice(b"ustar\x0000");
    header[156] = kind;
    let mut octal = String::new();
    write!(octal, "{:011o}", size.unwrap_or(bytes.len() as u64)).unwrap();
    header[124..135].copy_from_slice(octal.as_bytes());
    seal(&mut header);
    header.extend_from_slice(bytes);
    header.resize(header.len().next_multiple_of(512), 0);
    header
}

fn seal(header: &mut [u8]) {
    header[148..156].fill(b' ');
    let sum: u32 = header[..512].iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

fn found(members: &[Vec<u8>]) -> Result<std::ops::Range<u64>, String> {
    let all = [members.concat(), vec![0; 1024]].concat();
    disk(&all, all.len() as u64)
}

#[test]
fn the_disk_of_an_archive_is_the_first_file_of_its_directory() {
    let image = vec![7; 1000];
    let is = |members: &[Vec<u8>], start: u64| assert_eq!(found(members), Ok(start..start + 1000));
    is(&[member("disk/disk.img", b'0', &image, None)], 512);
    is(&[member("./disk/", b'5', &[], None), member("./disk/a.qcow2", b'0', &image, None)], 1024);
    is(&[member("etc/x", b'0', &[1; 513], None), member("/disk/a", 0, &image, None)], 512 * 4);
    let pax = member("pax", b'x', b"18 path=disk/long\n", None);
    is(&[pax, member("other", b'0', &image, None)], 512 * 3);
    let long = member("././@LongLink", b'L', b"disk/of a long name\0", None);
    is(&[long, member("disk", b'0', &image, None)], 512 * 3);
    // A size in base 256, and one in a pax header.
    let mut binary = member("disk/d", b'0', &image, None);
    binary[124..136].copy_from_slice(&[0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0xe8]);
    seal(&mut binary[..512]);
    is(&[binary], 512);
    let pax = member("pax", b'x', b"13 size=1000\n", None);
    is(&[pax, member("disk/d", b'0', &image, Some(0))], 512 * 3);
}

#[test]
fn an_archive_without_a_disk_or_with_lies_is_refused() {
    let refused = |members: &[Vec<u8>], why: &str| {
        let found = found(members).expect_err(why);
        assert!(found.contains(why), "{why}: {found}");
    };
    refused(&[member("etc/disk.img", b'0', &[1], None)], "no file in the directory disk");
    refused(&[member("disk/d", b'2', &[], None)], "no file in the directory disk");
    refused(&[member("disk/d", b'0', &[], None)], "is empty");
    refused(&[member("disk/d", b'S', &[1], None)], "sparse");
    let sparse = member("pax", b'x', b"22 GNU.sparse.major=1\n", None);
    refused(&[sparse, member("disk/d", b'0', &[1], None)], "sparse");
    refused(&[member("disk/d", b'0', &[1], Some(1 << 32))], "ends before a file");
    refused(&[member("a", b'0', &[1; 600], Some(4 << 30))], "ends before a file");
    let mut damaged = member("disk/d", b'0', &[1], None);
    damaged[0] ^= 1;
    refused(&[damaged], "not a tar archive");
    let mut huge = member("disk/d", b'0', &[1], None);
    huge[124..136].fill(0xff);
    seal(&mut huge[..512]);
    refused(&[huge], "its layer");
    // Behind what was read, and nothing at all.
    let far = [member("a", b'0', &vec![1; 70_000], None), member("disk/d", b'0', &[1], None)].concat();
    assert!(disk(&far[..64 << 10], far.len() as u64).unwrap_err().contains("the first 64 KiB"));
    assert!(disk(&[], 0).is_err() && disk(&[1; 511], 511).is_err());
    assert!(disk(b"QFI\xfb", 4).is_err());
}
