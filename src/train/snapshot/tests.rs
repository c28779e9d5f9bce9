//! Tests of snapshots: every moment at which a save can stop, full disks, damage, pruning.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use super::*;

const MOMENTS: [Moment; 6] =
    [Moment::Create, Moment::Write, Moment::Sync, Moment::Rename, Moment::SyncParent, Moment::Prune];

/// Two files that tell the step, one of them in a folder.
fn write(step: u64) -> impl FnMut(&Path) -> Result<()> {
    move |folder| {
        fs::write(folder.join("weights"), vec![step as u8; 5000]).unwrap();
        fs::create_dir(folder.join("state")).unwrap();
        fs::write(folder.join("state/step"), step.to_string()).unwrap();
        Ok(())
    }
}

fn save(snapshots: &Snapshots, step: u64) {
    snapshots.save(step, &mut write(step)).unwrap();
}

/// Step of the newest complete snapshot, whose content must be the one of that step.
#[track_caller]
fn newest(snapshots: &Snapshots) -> Option<u64> {
    let snapshot = snapshots.newest().unwrap().snapshot?;
    assert_eq!(fs::read_to_string(snapshot.path.join("state/step")).unwrap(), snapshot.step.to_string());
    Some(snapshot.step)
}

fn listed(folder: &Path) -> Vec<String> {
    folder::names(folder).unwrap()
}

#[test]
fn a_save_goes_through_all_moments_in_order() {
    let root = tempfile::tempdir().unwrap();
    let snapshots = Snapshots::new(root.path().join("a/b"), 1);
    let mut seen = Vec::new();
    save(&snapshots, 1);
    snapshots
        .save_watched(2, &mut write(2), &mut |moment| {
            seen.push(moment);
            Ok(())
        })
        .unwrap();
    assert_eq!(seen, MOMENTS);
    assert_eq!((newest(&snapshots), listed(&root.path().join("a/b"))), (Some(2), vec!["step-00000002".to_owned()]));
}

/// The process is gone at `moment`: no line of ours runs after it. Unwinding stands for that, because nothing here cleans up
/// when it unwinds.
fn killed(snapshots: &Snapshots, step: u64, moment: Moment) {
    let mut at = |now| if now == moment { resume_unwind(Box::new("killed")) } else { Ok(()) };
    let outcome = catch_unwind(AssertUnwindSafe(|| snapshots.save_watched(step, &mut write(step), &mut at)));
    assert!(outcome.is_err(), "{moment:?} never came");
}

#[test]
fn killed_at_any_moment_the_newest_is_the_old_or_the_new_one() {
    for keep in [1, 2] {
        for moment in MOMENTS {
            let root = tempfile::tempdir().unwrap();
            let snapshots = Snapshots::new(root.path(), keep);
            (1..=keep as u64).for_each(|step| save(&snapshots, step));
            let (old, new) = (keep as u64, keep as u64 + 1);
            killed(&snapshots, new, moment);
            let expected = if matches!(moment, Moment::SyncParent | Moment::Prune) { new } else { old };
            assert_eq!(newest(&snapshots), Some(expected), "{moment:?}");
            snapshots.sweep().unwrap();
            assert_eq!(newest(&snapshots), Some(expected), "{moment:?} after sweeping");
            assert!(listed(root.path()).iter().all(|name| name.starts_with(PREFIX)), "{moment:?}");
            save(&snapshots, new);
            assert_eq!((newest(&snapshots), listed(root.path()).len()), (Some(new), keep), "{moment:?} once more");
        }
    }
}

#[test]
fn a_rename_that_did_not_reach_the_disk_is_as_if_it_had_not_been() {
    let root = tempfile::tempdir().unwrap();
    let snapshots = Snapshots::new(root.path(), 2);
    save(&snapshots, 1);
    killed(&snapshots, 2, Moment::SyncParent);
    fs::rename(root.path().join("step-00000002"), root.path().join(".tmp-step-00000002")).unwrap();
    assert_eq!(newest(&snapshots), Some(1));
    snapshots.sweep().unwrap();
    assert_eq!(listed(root.path()), ["step-00000001"]);
}

#[test]
fn an_error_at_any_moment_leaves_no_rubbish() {
    for moment in MOMENTS {
        let root = tempfile::tempdir().unwrap();
        let snapshots = Snapshots::new(root.path(), 1);
        save(&snapshots, 1);
        let mut at = |now| if now == moment { Err(Error::Internal("stopped".into())) } else { Ok(()) };
        let error = snapshots.save_watched(2, &mut write(2), &mut at).unwrap_err();
        assert_eq!(error, Error::Internal("stopped".into()));
        assert!(listed(root.path()).iter().all(|name| name.starts_with(PREFIX)), "{moment:?}");
        assert!(newest(&snapshots).is_some(), "{moment:?}");
    }
}

#[test]
fn a_full_disk_keeps_the_old_one_and_says_how_much_is_free() {
    let root = tempfile::tempdir().unwrap();
    let snapshots = Snapshots::new(root.path(), 1);
    save(&snapshots, 1);
    let mut full = |folder: &Path| {
        fs::write(folder.join("weights"), [0; 1234]).unwrap();
        let path = Path::new("/dev/full");
        fs::write(path, [0; 10]).map_err(|error| Error::file(path, error))
    };
    let message = snapshots.save(2, &mut full).unwrap_err().to_string();
    let needed = folder::size(&root.path().join("step-00000001"));
    for part in ["step-00000002", "No space left", "after 1234 bytes", "now free: ", &format!("needs {needed} bytes")] {
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }
    assert_eq!((newest(&snapshots), listed(root.path())), (Some(1), vec!["step-00000001".to_owned()]));
    save(&snapshots, 2);
    assert_eq!(newest(&snapshots), Some(2));
}

#[test]
fn damage_is_told_and_passed_over() {
    type Damage = (&'static str, fn(&Path));
    let damages: [Damage; 7] = [
        ("its hash is another", |folder| {
            let mut bytes = fs::read(folder.join("weights")).unwrap();
            bytes[77] ^= 1;
            fs::write(folder.join("weights"), bytes).unwrap();
        }),
        ("has 4999 bytes instead of 5000", |folder| {
            File::options().write(true).open(folder.join("weights")).unwrap().set_len(4999).unwrap();
        }),
        ("state/step", |folder| fs::remove_file(folder.join("state/step")).unwrap()),
        ("manifest.json", |folder| fs::remove_file(folder.join(MANIFEST)).unwrap()),
        ("manifest.json", |folder| fs::write(folder.join(MANIFEST), "{\"format\": 2").unwrap()),
        ("outside its folder", |folder| {
            let text = fs::read_to_string(folder.join(MANIFEST)).unwrap();
            fs::write(folder.join(MANIFEST), text.replace("\"weights\"", "\"../weights\"")).unwrap();
        }),
        ("expected format 2, step 3", |folder| {
            let text = fs::read_to_string(folder.join(MANIFEST)).unwrap();
            fs::write(folder.join(MANIFEST), text.replace("\"step\": 3", "\"step\": 4")).unwrap();
        }),
    ];
    for (part, damage) in damages {
        let root = tempfile::tempdir().unwrap();
        let snapshots = Snapshots::new(root.path(), 9);
        (1..=3).for_each(|step| save(&snapshots, step));
        damage(&root.path().join("step-00000003"));
        let found = snapshots.newest().unwrap();
        assert!(found.damaged.len() == 1 && found.damaged[0].contains(part), "{:?} lacks {part:?}", found.damaged);
        assert_eq!(newest(&snapshots), Some(2), "{part}");
        // The damaged step is written anew when the run comes to it again.
        save(&snapshots, 3);
        assert_eq!(newest(&snapshots), Some(3), "{part}");
    }
}

#[test]
fn the_last_ones_are_kept_and_a_given_up_course_is_not() {
    let root = tempfile::tempdir().unwrap();
    let snapshots = Snapshots::new(root.path(), 2);
    assert!(snapshots.is_empty().unwrap() && newest(&snapshots).is_none());
    for step in [5, 10, 123_456_789, 200_000_000] {
        save(&snapshots, step);
    }
    assert_eq!(listed(root.path()), ["step-123456789", "step-200000000"]);
    save(&snapshots, 150_000_000);
    assert_eq!(snapshots.steps().unwrap(), [123_456_789, 150_000_000]);
    fs::create_dir(root.path().join("step-notes")).unwrap();
    snapshots.clear().unwrap();
    assert_eq!(listed(root.path()), ["step-notes"]);
}

#[test]
fn a_complete_snapshot_is_not_written_again() {
    let root = tempfile::tempdir().unwrap();
    let snapshots = Snapshots::new(root.path(), 2);
    save(&snapshots, 1);
    snapshots.save(1, &mut |_| panic!("written again")).unwrap();
}
