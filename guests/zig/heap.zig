//! The module's heap. A run is short and its memory goes with it, so allocations only move forward:
//! what is freed is used again if it was the last one allocated, and otherwise lost until the end.
//! The last allocation also grows in place, which is what reads a long input without copying it.

const std = @import("std");
const Alignment = std.mem.Alignment;
const page_bytes = std.wasm.page_size;
/// All 4 GiB do not fit into a usize; the last page is done without.
const most_pages: usize = std.math.maxInt(u16);

/// Fails with error.OutOfMemory where the module's memory limit is reached.
pub const allocator: std.mem.Allocator = .{
    .ptr = undefined,
    .vtable = &.{ .alloc = alloc, .resize = resize, .remap = remap, .free = free },
};

/// Set by the linker: the address after the stack and all static data.
extern var __heap_base: u8;

/// The first free address, and the end of what may be used without asking for more; 0 before the first use.
var top: usize = 0;
var end: usize = 0;

fn alloc(_: *anyopaque, len: usize, alignment: Alignment, _: usize) ?[*]u8 {
    if (end == 0) {
        top = @intFromPtr(&__heap_base);
        end = memoryEnd();
    }
    var start = alignment.forward(top);
    if (start +| len > end) {
        // Somebody else may have grown the memory since: theirs lies in between.
        if (end != memoryEnd()) {
            end = memoryEnd();
            start = end;
        }
        if (!extend(start +| len)) return null;
    }
    top = start + len;
    return @ptrFromInt(start);
}

fn resize(_: *anyopaque, memory: []u8, _: Alignment, new_len: usize, _: usize) bool {
    const start = @intFromPtr(memory.ptr);
    if (start + memory.len != top) return new_len <= memory.len;
    if (start +| new_len > end and (end != memoryEnd() or !extend(start +| new_len))) return false;
    top = start + new_len;
    return true;
}

fn remap(context: *anyopaque, memory: []u8, alignment: Alignment, new_len: usize, caller: usize) ?[*]u8 {
    return if (resize(context, memory, alignment, new_len, caller)) memory.ptr else null;
}

fn free(_: *anyopaque, memory: []u8, _: Alignment, _: usize) void {
    const start = @intFromPtr(memory.ptr);
    if (start + memory.len == top) top = start;
}

fn memoryEnd() usize {
    const pages: usize = @min(@wasmMemorySize(0), most_pages);
    return pages * page_bytes;
}

/// Makes the memory reach at least `new_end`; it ends at `end` now.
fn extend(new_end: usize) bool {
    const missing = new_end - end;
    const pages = missing / page_bytes + @intFromBool(missing % page_bytes != 0);
    if (pages > most_pages - end / page_bytes) return false;
    if (@wasmMemoryGrow(0, pages) < 0) return false;
    end += pages * page_bytes;
    return true;
}
