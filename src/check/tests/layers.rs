//! Layers that several disks need, when the records or maps of some are damaged.

use super::*;
use crate::format::layout::{data_path, map_path};
use crate::format::lineage::LayerEntry;
use crate::store::Origin;

fn clone(store: &Store, origin: &str, name: &str) {
    store.clone_disks(&Origin::parse(origin), &[NewDisk { size: None, ..disk(name, None) }], None).unwrap();
}

/// A store with a clone `c` of disk `one`, and the layer that both need.
fn with_clone() -> (TestStore, LayerEntry) {
    let fixture = TestStore::new();
    let store = fixture.open();
    clone(&store, "one", "c");
    let layer = store.disk("one").unwrap().lineage().layers[0].clone();
    store.close().unwrap();
    drop(store);
    fixture.assert_clean();
    (fixture, layer)
}

// The repair removed the layer, and a restore of the record found no data.
/// Guards D80.
#[test]
fn a_repair_keeps_the_layers_of_a_removed_disk_that_a_damaged_record_may_need() {
    let (fixture, layer) = with_clone();
    fixture.change("one", |record| record.unlinked = true);
    let record = fixture.path(&format!("disks/{}.disk", fixture.id("c")));
    let whole = fs::read(&record).unwrap();
    fs::write(&record, "damaged").unwrap();
    fixture.assert_lasting(12, "may need its layers");
    fs::write(&record, &whole).unwrap();
    let number = layer.number;
    assert!(fixture.path(&data_path(number)).exists());
    assert!(fixture.path(&map_path(number, layer.map.generation)).exists());
    fixture.assert_repaired(12, "was removed");
    assert!(fixture.path(&data_path(number)).exists(), "the clone needs it");
    fixture.assert_clean();
}

#[test]
fn a_repair_keeps_a_dropped_layer_that_another_disk_needs() {
    let (fixture, layer) = with_clone();
    fixture.change("one", |record| {
        record.lineage.layers.clear();
        record.lineage.below = None;
        record.lineage.dropped.push(layer.number);
    });
    let record = fixture.path(&format!("disks/{}.disk", fixture.id("c")));
    let whole = fs::read(&record).unwrap();
    fs::write(&record, "damaged").unwrap();
    fixture.assert_lasting(12, "may need them");
    fs::write(&record, &whole).unwrap();
    fixture.assert_repaired(12, "old layers");
    assert!(fixture.path(&data_path(layer.number)).exists());
    fixture.assert_clean();
}

// The last disk that needs a layer decided, and only the first one had the finding.
#[test]
fn a_repair_keeps_the_other_map_files_of_a_damaged_layer_that_several_disks_need() {
    let (fixture, layer) = with_clone();
    let (number, generation) = (layer.number, layer.map.generation);
    let named = fixture.path(&map_path(number, generation));
    let other = fixture.path(&map_path(number, generation + 1));
    fs::rename(&named, &other).unwrap();
    fixture.assert_lasting(8, "restore the disk");
    fixture.assert_lasting(11, "other findings");
    assert!(other.exists());
}
