//! Tests of keys, of the cipher, and of encrypted files.

use std::sync::atomic::{AtomicBool, Ordering};

use aes::cipher::KeyInit as _;
use proptest::prelude::*;
use xts_mode::{Xts128, get_tweak_default};

use super::*;
use crate::format::BLOCK;
use crate::io::sim::{Rng, SimMedium};
use crate::io::{HostMedium, Medium, Open};

const SECRET: &[u8] = b"0123456789abcdef0123456789abcdef";

fn key(seed: u8) -> DataKey {
    let mut bytes = [0; KEY];
    bytes.iter_mut().zip(0u8..).for_each(|(byte, n)| *byte = n.wrapping_mul(7).wrapping_add(seed));
    DataKey::of(Zeroizing::new(bytes))
}

fn hex(text: &str) -> Vec<u8> {
    hex::decode(text).unwrap()
}

/// IEEE 1619-2007, vector 10. Its data unit has 512 bytes; a unit of 4096 bytes begins the same.
#[test]
fn a_block_is_encrypted_as_the_standard_says() {
    let mut bytes = [0; KEY];
    bytes[..32].copy_from_slice(&hex("2718281828459045235360287471352662497757247093699959574966967627"));
    bytes[32..].copy_from_slice(&hex("3141592653589793238462643383279502884197169399375105820974944592"));
    let key = DataKey::of(Zeroizing::new(bytes));
    let plain: Vec<u8> = (0..=255u8).cycle().take(4096).collect();
    let mut block = plain.clone();
    key.xts.encrypt(&mut block, 0xff);
    let wanted = "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b\
                  5d31e276f8fe4a8d66b317f9ac683f44680a86ac35adfc3345befecb4bb188fd";
    assert_eq!(block[..64], hex(wanted)[..]);
    key.xts.decrypt(&mut block, 0xff);
    assert_eq!(block, plain);
}

proptest! {
    #[test]
    fn blocks_are_encrypted_as_the_library_of_the_mode_does(
        bytes in any::<[u8; 32]>(), more in any::<[u8; 32]>(), first in 0..1u64 << 34, fill in any::<u8>()
    ) {
        let mut both = [0; KEY];
        both[..32].copy_from_slice(&bytes);
        both[32..].copy_from_slice(&more);
        let key = DataKey::of(Zeroizing::new(both));
        let library = Xts128::new(Aes256::new(&bytes.into()), Aes256::new(&more.into()));
        let plain: Vec<u8> = (0..3 * 4096u32).map(|n| (n / 7) as u8 ^ fill).collect();
        let (mut ours, mut theirs) = (plain.clone(), plain.clone());
        key.xts.encrypt(&mut ours, first);
        library.encrypt_area(&mut theirs, 4096, u128::from(first), get_tweak_default);
        prop_assert_eq!(&ours, &theirs);
        key.xts.decrypt(&mut ours, first);
        prop_assert_eq!(ours, plain);
    }
}

/// Guards D87.
#[test]
fn a_key_is_unwrapped_with_its_secret_salt_and_number_only() {
    let wrapping = WrappingKey::derive(SECRET, &[1; SALT]).unwrap();
    let wrapped = wrapping.wrap(7, &key(3));
    assert_eq!(*wrapping.unwrap(7, &wrapped).unwrap().bytes, *key(3).bytes);
    let same = WrappingKey::derive(&[SECRET, b"\n"].concat(), &[1; SALT]).unwrap();
    assert_eq!(*same.unwrap(7, &wrapped).unwrap().bytes, *key(3).bytes);
    assert_eq!(wrapping.unwrap(8, &wrapped).unwrap_err(), KeyError::Wrong);
    let other = WrappingKey::derive(SECRET, &[2; SALT]).unwrap();
    assert_eq!(other.unwrap(7, &wrapped).unwrap_err(), KeyError::Wrong);
    let other = WrappingKey::derive(&[b"x", SECRET].concat(), &[1; SALT]).unwrap();
    assert_eq!(other.unwrap(7, &wrapped).unwrap_err(), KeyError::Wrong);
    for at in 0..WRAPPED {
        let mut damaged = wrapped;
        damaged[at] ^= 1;
        assert_eq!(wrapping.unwrap(7, &damaged).unwrap_err(), KeyError::Wrong, "byte {at}");
    }
    // No part of the key is in the wrapped bytes, and `Debug` shows nothing.
    assert!(!wrapped.windows(8).any(|part| key(3).bytes.windows(8).any(|of_key| part == of_key)));
    assert_eq!(format!("{:?} {:?}", key(3), wrapping), "DataKey(..) WrappingKey(..)");
}

#[test]
fn a_secret_that_is_not_random_is_refused() {
    let derive = |secret: &[u8]| WrappingKey::derive(secret, &[0; SALT]).map(drop);
    assert_eq!(derive(b"password\n"), Err(KeyError::Short));
    assert_eq!(derive(b""), Err(KeyError::Short));
    assert_eq!(derive(&[0; 64]), Err(KeyError::NotRandom));
    assert_eq!(derive(&SECRET[..31]), Err(KeyError::Short));
    // A binary key may end with a newline.
    let mut binary = SECRET.to_vec();
    binary[31] = b'\n';
    assert_eq!(derive(&binary), Ok(()));
}

fn sim() -> (SimMedium, Arc<dyn MediumFile>) {
    let medium = SimMedium::new(1);
    medium.make_dir("deltas").unwrap();
    let file = medium.open("deltas/1.data", Open::Create).unwrap();
    (medium, file)
}

/// Guards D86.
#[test]
fn an_encrypted_file_reads_as_a_plain_one_and_stores_no_plaintext() {
    for seed in 0..40 {
        let mut rng = Rng::new(seed);
        let (_medium, stored) = sim();
        let file = Cipher::Key(Arc::new(key(1))).over(stored.clone());
        let mut model = vec![0u8; 40 * 4096];
        for _ in 0..60 {
            let at = rng.below(30 * BLOCK);
            let most = if rng.chance(50) { 600 } else { 5 * BLOCK };
            let len = 1 + rng.below(most);
            let (from, to) = (at as usize, (at + len) as usize);
            match rng.below(10) {
                0..5 => {
                    // Few different bytes, so that plaintext would be found.
                    let bytes = vec![0x5a; len as usize];
                    file.write_at(&bytes, at).unwrap();
                    model[from..to].copy_from_slice(&bytes);
                }
                5 => {
                    let (first, end) = (at / BLOCK, (at + len).div_ceil(BLOCK));
                    file.punch(first * BLOCK, (end - first) * BLOCK).unwrap();
                    model[(first * BLOCK) as usize..(end * BLOCK) as usize].fill(0);
                }
                6 => {
                    file.set_len(at).unwrap();
                    let end = at.next_multiple_of(BLOCK);
                    model[end as usize..].fill(0);
                    assert_eq!(stored.len().unwrap(), end);
                }
                _ => {
                    for now in [false, true] {
                        let mut buf = vec![0xee; len as usize];
                        let got = match now {
                            true => match file.read_now(&mut buf, at).unwrap() {
                                Some(got) => got,
                                None => continue,
                            },
                            false => file.read_at(&mut buf, at).unwrap(),
                        };
                        buf[got..].fill(0);
                        assert_eq!(buf, model[from..to], "seed {seed}, {len} bytes at {at}");
                    }
                }
            }
        }
        let mut raw = vec![0; 40 * 4096];
        let got = stored.read_at(&mut raw, 0).unwrap();
        assert!(!raw[..got].windows(8).any(|part| part == [0x5a; 8]), "seed {seed}");
    }
}

#[test]
fn a_locked_file_is_synced_and_cut_but_not_read_or_written() {
    let (_medium, stored) = sim();
    stored.write_at(&[7; 3 * 4096], 0).unwrap();
    let file = Cipher::Locked.over(stored.clone());
    let mut buf = [0; 16];
    for error in [
        file.read_at(&mut buf, 0).unwrap_err(),
        file.read_now(&mut buf, 0).unwrap_err(),
        file.write_at(&buf, 0).unwrap_err(),
    ] {
        assert_eq!(error.raw_os_error(), Some(libc::ENOKEY));
    }
    assert_eq!(buf, [0; 16]);
    file.set_len(5000).unwrap();
    file.sync_data().unwrap();
    assert_eq!(stored.len().unwrap(), 8192);
}

#[test]
fn a_file_that_ends_within_a_block_is_an_error() {
    let (_medium, stored) = sim();
    let file = Cipher::Key(Arc::new(key(1))).over(stored.clone());
    file.write_at(&[1; 8192], 0).unwrap();
    stored.set_len(8000).unwrap();
    assert!(file.read_at(&mut [0; 4096], 4096).unwrap_err().to_string().contains("ends within a block"));
    assert_eq!(file.read_at(&mut [0; 4096], 0).unwrap(), 4096);
}

/// Guards D86.
#[test]
fn a_reader_never_decrypts_a_part_of_a_write() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let stored = HostMedium::new(dir.path()).unwrap().open("1.data", Open::Create).unwrap();
    let file = Cipher::Key(Arc::new(key(1))).over(stored);
    let len = 64 << 10;
    file.write_at(&vec![1; len], 0).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0..3000u32 {
                file.write_at(&vec![(n % 2) as u8 + 1; len], 0).unwrap();
            }
            done.store(true, Ordering::Release);
        });
        let mut buf = vec![0; len];
        while !done.load(Ordering::Acquire) {
            file.read_at(&mut buf, 0).unwrap();
            assert!(buf.iter().all(|byte| *byte == 1) || buf.iter().all(|byte| *byte == 2));
            if file.read_now(&mut buf, 0).unwrap().is_some() {
                assert!(buf.iter().all(|byte| *byte == 1) || buf.iter().all(|byte| *byte == 2));
            }
        }
    });
}

#[test]
fn stored_blocks_are_put_back_without_the_key() {
    let (_medium, stored) = sim();
    let file = Cipher::Key(Arc::new(key(1))).over(stored.clone());
    file.write_at(&[1; BLOCK as usize], 3 * BLOCK).unwrap();
    let mut before = [0; BLOCK as usize];
    stored.read_at(&mut before, 3 * BLOCK).unwrap();
    file.write_at(&[2; BLOCK as usize], 3 * BLOCK).unwrap();
    Cipher::Locked.over(stored.clone()).write_stored(&before, 3 * BLOCK).unwrap();
    let mut shown = [0; BLOCK as usize];
    file.read_at(&mut shown, 3 * BLOCK).unwrap();
    assert_eq!(shown, [1; BLOCK as usize]);
}
