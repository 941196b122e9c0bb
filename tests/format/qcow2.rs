//! qcow2 images with every setting of qemu-img.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use plyfs::image::Format;

use super::{Numbers, all_combinations, directory, disk_bytes, run, same_as_qemu, text};

#[derive(Clone, Debug, PartialEq)]
struct Kind {
    compat: &'static str,
    cluster: u64,
    compressed: Option<&'static str>,
    extended: bool,
    preallocation: &'static str,
    size: u64,
    /// Written afterwards: data, zeros, discards, compressed clusters, with a snapshot in the middle.
    changed: bool,
    /// Has a backing image.
    backed: bool,
}

const SIZES: [u64; 5] = [0, 512, 3 * 1024 * 1024 + 512, 9_999_872, 2 << 20];

fn kinds() -> Vec<Kind> {
    let mut all = Vec::new();
    for compat in ["0.10", "1.1"] {
        for bits in 9..=21 {
            for compressed in [None, Some("zlib"), Some("zstd")] {
                for extended in [false, true] {
                    for preallocation in ["off", "metadata", "falloc", "full"] {
                        for size in SIZES {
                            for (changed, backed) in [(false, false), (true, false), (true, true)] {
                                let cluster = 1 << bits;
                                let kind = Kind {
                                    compat,
                                    cluster,
                                    compressed,
                                    extended,
                                    preallocation,
                                    size,
                                    changed,
                                    backed,
                                };
                                if kind.is_possible() {
                                    all.push(kind);
                                }
                            }
                        }
                    }
                }
            }
        }
    }
    all
}

impl Kind {
    /// Whether qemu-img accepts these settings.
    fn is_possible(&self) -> bool {
        let old = self.compat == "0.10";
        !(old && (self.compressed == Some("zstd") || self.extended)
            || self.extended && self.cluster < 16 * 1024
            || self.preallocation != "off" && (self.compressed.is_some() || self.backed && !self.extended)
            || self.changed && self.size < 1 << 20)
    }

    /// All pairs of its settings.
    fn pairs(&self) -> Vec<(String, String)> {
        let Self { compat, cluster, compressed, extended, preallocation, size, changed, backed } = self;
        let all = [
            format!("compat {compat}"),
            format!("cluster {cluster}"),
            format!("compressed {compressed:?}"),
            format!("extended {extended}"),
            format!("preallocation {preallocation}"),
            format!("size {size}"),
            format!("changed {changed} {backed}"),
        ];
        let mut pairs = Vec::new();
        for (index, a) in all.iter().enumerate() {
            pairs.extend(all[index + 1..].iter().map(|b| (a.clone(), b.clone())));
        }
        pairs
    }

    fn options(&self) -> String {
        let mut options = format!("compat={},cluster_size={}", self.compat, self.cluster);
        if self.extended {
            options += ",extended_l2=on";
        }
        if self.preallocation != "off" {
            options += &format!(",preallocation={}", self.preallocation);
        }
        if let Some(method) = self.compressed.filter(|_| self.compat == "1.1") {
            options += &format!(",compression_type={method}");
        }
        options
    }

    fn make(&self, dir: &Path, numbers: &mut Numbers) -> Vec<PathBuf> {
        let (image, raw, under) = (dir.join("image"), dir.join("raw"), dir.join("under"));
        let filled = disk_bytes(self.size as usize, numbers);
        fs::write(&raw, &filled).expect("write");
        let mut paths = vec![image.clone()];
        let options = self.options();
        if self.backed {
            // The backing image is shorter and has other settings.
            fs::write(&raw, &filled[..filled.len() - 300_000]).expect("write");
            run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", "-c", text(&raw), text(&under)]);
            let size = self.size.to_string();
            let args = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", text(&under), "-o", &options];
            run("qemu-img", &[&args[..], &[text(&image), &size]].concat());
            paths.push(under);
        } else if self.preallocation == "metadata" && self.changed {
            // Clusters that are allocated and were never written.
            let size = self.size.to_string();
            run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, text(&image), &size]);
        } else {
            let mut args = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", &options];
            args.extend(self.compressed.map(|_| "-c"));
            run("qemu-img", &[&args[..], &[text(&raw), text(&image)]].concat());
        }
        if self.changed {
            self.change(&image, numbers);
            run("qemu-img", &["snapshot", "-c", "before", text(&image)]);
            self.change(&image, numbers);
        }
        paths
    }

    fn change(&self, image: &Path, numbers: &mut Numbers) {
        let cluster = self.cluster;
        let mut commands = Vec::new();
        for _ in 0..12 {
            let (mut at, mut len) = (numbers.below(self.size), 1 + numbers.below(150_000));
            let how = numbers.below(6);
            if numbers.below(2) == 0 {
                (at, len) = (at / cluster * cluster, len.next_multiple_of(cluster));
            } else if how >= 3 {
                (at, len) = (at / 512 * 512, len.next_multiple_of(512));
            }
            len = len.min(self.size - at);
            commands.push(match how {
                0..=2 => format!("write -q -P {} {at} {len}", 1 + numbers.below(255)),
                3 => format!("write -q -z {at} {len}"),
                4 => format!("write -q -z -u {at} {len}"),
                _ => format!("discard -q {at} {len}"),
            });
        }
        let all = |commands: &[String]| -> Vec<String> {
            let start = ["-f", "qcow2", "-d", "unmap"].map(str::to_owned);
            let each = commands.iter().flat_map(|command| ["-c".to_owned(), command.clone()]);
            start.into_iter().chain(each).chain([text(image).to_owned()]).collect()
        };
        if self.compressed.is_some() {
            let at = numbers.below(self.size) / cluster * cluster;
            let len = cluster.min(self.size - at);
            // A compressed cluster can only be written where none is allocated; elsewhere this fails.
            let command = format!("write -q -c -P {} {at} {len}", 1 + numbers.below(255));
            Command::new("qemu-io").args(all(&[command])).output().expect("qemu-io runs");
        }
        let args = all(&commands);
        run("qemu-io", &args.iter().map(String::as_str).collect::<Vec<_>>());
    }
}

/// Tests one of `PARTS` parts of the images, so that the tests run in parallel.
fn check(part: usize) {
    const PARTS: usize = 2;
    let mut all = kinds();
    assert!(all.len() > 1000);
    if !all_combinations() {
        let mut missing: std::collections::HashSet<_> = all.iter().flat_map(Kind::pairs).collect();
        // The order is shuffled, so that the images taken differ in all settings.
        let mut numbers = Numbers(0x5eed);
        for index in (1..all.len()).rev() {
            all.swap(index, numbers.below(index as u64 + 1) as usize);
        }
        all.retain(|kind| kind.pairs().iter().filter(|pair| missing.remove(pair)).count() > 0);
        assert!(missing.is_empty());
    }
    eprintln!("{} images", all.len());
    for (index, kind) in all.iter().enumerate().filter(|(index, _)| index % PARTS == part) {
        let dir = directory();
        let paths = kind.make(dir.path(), &mut Numbers(0x1234_5678 + index as u64));
        same_as_qemu(&format!("{kind:?}"), Format::Qcow2, &paths);
    }
}

#[test]
fn qcow2_reads_as_qemu_reads_it_first_half() {
    check(0);
}

#[test]
fn qcow2_reads_as_qemu_reads_it_second_half() {
    check(1);
}
