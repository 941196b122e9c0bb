use std::fs;

use super::*;
use crate::format::proof::{GROUP, Layout, hex};

fn image(dir: &Path, bytes: &[u8]) -> PathBuf {
    let path = dir.join("a.raw");
    fs::write(&path, bytes).unwrap();
    path
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()[5]).collect()
}

#[test]
fn the_root_is_the_blake3_hash_of_the_file_and_the_size_follows_from_that_of_the_image() {
    let dir = tempfile::tempdir().unwrap();
    for len in [1, 16_384, 16_385, 1_048_577, 3 << 20] {
        let all = bytes(len);
        let path = image(dir.path(), &all);
        let sealed = seal(&path, &beside(&path), &mut |_| true).unwrap();
        assert_eq!(sealed.root, *blake3::hash(&all).as_bytes(), "{len}");
        assert_eq!(sealed.proof, dir.path().join("a.raw.obao"));
        let proof = fs::read(&sealed.proof).unwrap();
        assert_eq!(proof.len() as u64, sealed.proof_size);
        assert_eq!(sealed.proof_size, Layout::of(len as u64).proof_size());
        assert_eq!(ProofHeader::decode(&proof).unwrap(), ProofHeader { size: len as u64, root: sealed.root });
        assert_eq!(hex(&sealed.root), blake3::hash(&all).to_string());
        // Only the image and its proof.
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}

#[test]
fn a_file_that_is_no_proof_is_not_replaced_and_an_earlier_proof_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), &bytes(100_000));
    let error = seal(&path, &path, &mut |_| true).unwrap_err().to_string();
    assert!(error.contains("no proof") && error.contains("--out"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), bytes(100_000));
    assert!(matches!(seal(&path, dir.path(), &mut |_| true), Err(SealError::Taken { .. })));
    let first = seal(&path, &beside(&path), &mut |_| true).unwrap();
    image(dir.path(), &bytes(GROUP as usize * 3));
    let second = seal(&path, &beside(&path), &mut |_| true).unwrap();
    assert_ne!(first.root, second.root);
}

#[test]
fn an_image_that_changes_meanwhile_gets_no_proof_and_nothing_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), &bytes(3 << 20));
    let mut note = |done| {
        if done == 1 << 20 {
            let file = OpenOptions::new().append(true).open(&path).unwrap();
            file.set_len(5 << 20).unwrap();
        }
        true
    };
    let error = seal(&path, &beside(&path), &mut note).unwrap_err().to_string();
    assert!(error.contains("changed meanwhile"), "{error}");
    assert!(matches!(seal(&path, &beside(&path), &mut |_| false), Err(SealError::Interrupted)));
    fs::write(&path, b"").unwrap();
    assert!(matches!(seal(&path, &beside(&path), &mut |_| true), Err(SealError::Image { .. })));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn an_image_that_grows_as_fast_as_it_is_read_is_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), &bytes(2 << 20));
    let mut note = |done| {
        let file = OpenOptions::new().append(true).open(&path).unwrap();
        file.set_len(done + (2 << 20)).unwrap();
        done < 50 << 20
    };
    let error = seal(&path, &beside(&path), &mut note).unwrap_err();
    assert!(matches!(error, SealError::Image { .. }), "{error}");
}

/// Regression: both wrote into one file, and the name of the first was taken over by what the second had not written yet.
#[test]
fn of_two_commands_that_make_one_proof_at_once_one_is_refused_and_the_other_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (all, out) = (bytes(3 << 20), dir.path().join("a.obao"));
    let (one, other) = (image(dir.path(), &all), dir.path().join("b.raw"));
    fs::write(&other, bytes(100_000)).unwrap();
    let mut second = None;
    let mut note = |done| {
        if done == 2 << 20 {
            second = Some(seal(&other, &out, &mut |_| true));
        }
        true
    };
    let first = seal(&one, &out, &mut note).unwrap();
    let refused = second.unwrap().unwrap_err();
    assert!(matches!(refused, SealError::Busy { .. }), "{refused}");
    let alone = seal(&one, &beside(&one), &mut |_| true).unwrap();
    assert_eq!((first.root, fs::read(&out).unwrap()), (alone.root, fs::read(beside(&one)).unwrap()));
    // What a command that was killed left behind keeps no other out.
    fs::write(dir.path().join(staged("a.obao")), vec![1; 1 << 20]).unwrap();
    seal(&one, &out, &mut |_| true).unwrap();
    assert_eq!(fs::read(&out).unwrap(), fs::read(beside(&one)).unwrap());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 4);
}
